"""All classes of trained agents. Each of them writes answers, whatever it learned from."""

from models.learning.preference_agent import PreferenceAgent
from models.learning.proactive_agent import ProactiveAgent
from models.online.online_agent import OnlineAgent

AGENTS: tuple[type[ProactiveAgent], ...] = (ProactiveAgent, PreferenceAgent, OnlineAgent)
