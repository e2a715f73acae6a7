"""What the processes of tests need, imported once: they are forked from the process that has imported this."""

import transformers
import transformers.models.llama.modeling_llama  # noqa: F401

import models.learning.proactive_agent
import models.learning.reward_classifier  # noqa: F401
