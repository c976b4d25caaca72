"""``visionzip demo``: a page that shows what is kept of an image, answers with and without VisionZip, and compares."""
