"""``visionzip benchmark prefill | generate | memory``: what visual tokens cost the whole model, method by method."""
