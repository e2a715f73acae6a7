"""What holds for every test."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # tests never assert time
settings.load_profile("untimed")
