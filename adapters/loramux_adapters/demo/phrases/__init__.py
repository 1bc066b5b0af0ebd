"""The hand-written words that the demo data sets are made from. Plain constants, no code."""
