"""Objectives of masked pretraining."""
