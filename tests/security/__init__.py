"""Attacks on the jail, run as root and as an ordinary user; docs/security.md has their table."""
