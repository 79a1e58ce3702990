"""Rewards that check: answers, form, instructions, queries. What can hang or evaluate runs apart (isolated.py)."""
