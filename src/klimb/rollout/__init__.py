"""Rollouts: the engine protocol and the engine that runs in the trainer's process."""
