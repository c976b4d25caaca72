"""From answers to scores: how they meet their questions, open answers, and judges."""
