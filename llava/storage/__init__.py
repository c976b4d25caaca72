"""Files and folders that are whole or as they were, locks on them, and checksums by which weights are known again."""
