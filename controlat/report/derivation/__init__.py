"""A derived schedule in words and pictures: everything comes from its result file."""
