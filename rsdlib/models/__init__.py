"""Encoders, heads, U-Net, BLIP; an `nn.Module` with `features` and `image_size` joins as it is."""

from rsdlib.models.blip import LENGTH, REPEAT, CaptionObjective, caption_all, open_captioner
from rsdlib.models.domain import Domain, texture
from rsdlib.models.encoders import Encoder, Frozen, clip_pair, create, open_front, pipeline_folder
from rsdlib.models.heads import HEADS, JointObjective, PromptRegressor, joint_loss, ridge
from rsdlib.models.sampling import open_pipeline, sample, sample_rows, sample_stored, weights_of
from rsdlib.models.speech import Speech, open_speech
from rsdlib.models.unet import KeepingObjective, encoder_parts, into_unet, swap_encoder, text_states
from rsdlib.weights import MODELS, locate, whereabouts
