"""The stages of a job, and the scorers of its stage ``score``: one file each."""
