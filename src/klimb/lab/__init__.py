"""Small worlds whose truth is known, by enumeration or by a program, and small models to live in them."""
