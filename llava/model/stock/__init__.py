"""Models of transformers as they are, behind the interface that this package's commands use."""
