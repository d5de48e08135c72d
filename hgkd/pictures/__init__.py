"""Pictures and pages: features as colours, attention, reconstructions, comparisons, reports."""
