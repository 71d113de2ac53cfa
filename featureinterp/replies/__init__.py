"""Replies of language models: what of them is the answer, and what it says."""

from featureinterp.replies.reading import Level, object_schema, parse_reply, parse_with_end
from featureinterp.replies.thoughts import answer_of

__all__ = ["Level", "answer_of", "object_schema", "parse_reply", "parse_with_end"]
