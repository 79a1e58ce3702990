"""Where scores come from: functions, rules, models, judges, and mixtures of them, whose failures are kept in check."""
