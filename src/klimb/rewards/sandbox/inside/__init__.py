"""What runs inside the sandbox, in a Python that sees the standard library alone: nothing here imports klimb."""
