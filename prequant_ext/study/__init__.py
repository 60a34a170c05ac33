"""The paper's tables and figures: which runs they take, the runs themselves, and what they show."""
