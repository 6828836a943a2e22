"""Code that the stage scripts share: one small file for each thing that must have one definition."""
