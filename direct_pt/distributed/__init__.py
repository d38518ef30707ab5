"""Processes: what the launcher asks for, how they meet, what they tell each other."""
