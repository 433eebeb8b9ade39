"""What a looped model is: hooked modules, one file per family, and the registry of families."""

from models import albert as albert
from models import hrm_text as hrm_text
from models import huginn as huginn
from models import hyperloop as hyperloop
from models import melt as melt
from models import nanbeige as nanbeige
from models import ouro as ouro
from models import parcae as parcae
from models import recurrent_depth as recurrent_depth
from models import retrofit as retrofit
from models import smollm as smollm
from models import spiral as spiral
from models import training_free as training_free
from models import training_free_gpt2 as training_free_gpt2
