"""What measures: the clock, the phases of ``generate``, peak memory."""
