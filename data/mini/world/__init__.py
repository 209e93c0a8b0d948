"""What belongs to the mini world alone: its judge, and what is known of its scenes."""

from mini_world.judge import Judge
from mini_world.scenes import known_causes, named, names, open_judge, scenes, shows

__all__ = ["Judge", "known_causes", "named", "names", "open_judge", "scenes", "shows"]
