"""Rewards: rules scored in killable processes. Importing the package imports nothing heavy."""
