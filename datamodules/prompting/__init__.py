"""From records to token ids: prompt templates, chats, tokenizers."""
