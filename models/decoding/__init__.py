"""Writing answers: branches of one cache, prefix caches, grammars."""
