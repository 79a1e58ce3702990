"""Stages: one file each, its config on top, its loop below."""
