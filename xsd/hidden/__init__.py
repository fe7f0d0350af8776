"""Room 3, paired hidden states: extracting them and keeping them."""
