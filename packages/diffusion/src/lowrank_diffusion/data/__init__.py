"""Captioned pictures: where they are found, how they are cut, and which of them make up a step."""
