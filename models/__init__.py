"""What a looped model is: hooked modules, one file per family, and the registry of families."""

from models import ouro as ouro
from models import recurrent_depth as recurrent_depth
