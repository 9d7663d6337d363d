"""`FactorAccumulator` in other people's training loops; each module imports its framework, this one none."""
