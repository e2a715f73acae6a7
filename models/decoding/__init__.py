"""Generation: branched KV caches, prefix caches, grammars."""
