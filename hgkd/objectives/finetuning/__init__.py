"""Objectives of fine-tuning."""
