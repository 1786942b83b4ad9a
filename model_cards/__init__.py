"""The cards of the zoo, and the template that they share. Data, no code."""
