"""Several processes: what the launcher asks for, how they find each other, and how they exchange values."""
