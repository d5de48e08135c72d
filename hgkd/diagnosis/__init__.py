"""Diagnosis: of the environment, of a training before it is started, of steps that were not finite."""
