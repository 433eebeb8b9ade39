"""The declarations of a family of looped models: its schedule, its weights' use, its facts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.models.core.attention import Rows, Visible, causal_keys
from loopscope.models.core.hooks import NO_TAPS, Taps
from loopscope.models.core.state import Slot, Visit


class Family(nn.Module):
    """The interface of a family, with defaults for everything that most families do not have.

    A family defines `plan` (its schedule), `embed`, `enter` and `leave` (the computations at the
    start and the end of an iteration), `normalize` and `unembed` (final norm and head), the names
    of its sites, and its facts.

    Attributes:
        causal: Whether a later token never changes an earlier result.
        prefix_readout: Whether a run that stops after t iterations has the logits of a call with
            n_loops=t.
        additive_residual: Whether the residual stream is a plain sum of component outputs.
        batch_independent: Whether a row's result never depends on the other rows.
        heads_read_stream: Whether a head's queries, keys and values are made of the residual stream
            at their own visit.
        runs_visits: Whether a run goes through the schedule visit by visit, so that another
            schedule can be run.
        visible: The rule that says which keys a row may see.
        lens_site: The site of a block that a logit lens reads, because the final norm can read its
            value.
        wide_weights: A regular expression for the names of parameters that may be float32 beside
            others of 16 bits.
    """

    causal: ClassVar[bool] = True
    prefix_readout: ClassVar[bool] = True
    batch_independent: ClassVar[bool] = True
    heads_read_stream: ClassVar[bool] = True
    runs_visits: ClassVar[bool] = True
    visible: ClassVar[Visible] = staticmethod(causal_keys)
    lens_site: ClassVar[str] = "hook_resid_post"
    wide_weights: ClassVar[str] = ""

    @property
    def additive_residual(self) -> bool:
        """Whether the residual stream is a plain sum of component outputs."""
        return True

    @property
    def rowwise(self) -> bool:
        """Whether each (batch, position) is computed on its own outside attention, and every part
        of the state is "batch pos ...", so that any rows can be run side by side.
        """
        return True

    @property
    def linear_head(self) -> bool:
        """Whether logits are a linear map of the normalised stream: no cap comes after the head."""
        return True

    @property
    def loop_parts(self) -> tuple[str, ...]:
        """The parts of the state that one iteration hands to the next."""
        return ("resid",)

    @property
    def positional(self) -> bool:
        """Whether a token's position changes what the model computes for the token."""
        return True

    @property
    def fixed_length(self) -> bool:
        """Whether every input must fill all `n_ctx` positions, without padding."""
        return False

    @abstractmethod
    def plan(self, n_loops: int) -> list[Slot]:
        """The schedule of a call, in order."""

    @abstractmethod
    def edge_sites(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Hook names before the first visit, and after the last."""

    def aside(self) -> list[Slot]:
        """Visits of passes that no plain call makes, whose hook points exist all the same."""
        return []

    @abstractmethod
    def embed(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The residual stream before the first visit, and the family's other parts of the state;
        may take options of its own.
        """

    def visit_block(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], rows: Rows, taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Run one block. A family whose blocks read or write other parts of the state does so
        here.
        """
        return visit.block(resid, rows, taps), parts

    def enter(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Act before a visit that opens an iteration."""
        return resid, parts

    def leave(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Act after a visit that closes an iteration."""
        return resid, parts

    def loops_after_prompt(self, n_loops: int) -> int:
        """Iterations for the tokens that are generated, in a call whose prompt is given
        `n_loops`.
        """
        return n_loops

    def normalize(
        self, resid: Float[Tensor, "batch pos d_model"], taps: Taps = NO_TAPS
    ) -> Float[Tensor, "batch pos d_model"]:
        """The final norm of any residual stream: the module `final_norm`, unless the family says
        otherwise.
        """
        final_norm = getattr(self, "final_norm", None)
        if final_norm is None:
            raise NotImplementedError(
                f"a family needs a final norm, and {type(self).__name__} has none; give it a module"
                " `final_norm`, or define `normalize`"
            )
        normalized: Tensor = final_norm(resid, taps)
        return normalized

    @property
    def final_scale_site(self) -> str:
        """Where the final norm shows its divisor."""
        return str(getattr(getattr(self, "final_norm", None), "scale_site", "ln_final.hook_scale"))

    @abstractmethod
    def unembed(
        self, normalized: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """The head, which reads a normalised residual stream."""

    @property
    @abstractmethod
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The token embedding."""

    @property
    @abstractmethod
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding."""

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The unembedding's bias; zeros where the head has none."""
        return self.W_E.new_zeros(self.W_E.shape[0])
