"""Who holds what, who sends what to whom, and when."""
