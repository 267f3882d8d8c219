"""Far tokens get positions that approach, but never reach, the end of the window, so no text is too long."""

import posenc


class SaturatingParams(posenc.RemapParams):
    near: int | None = None


class Saturating(posenc.PositionStrategy):
    name = "saturating"
    summary = "exact distances nearby, positions that saturate at the window beyond"
    paper = "the tutorial of posenc"
    Params = SaturatingParams
    capabilities = posenc.Capabilities(bounded=True)

    def segments(self, lengths):
        window, near, index = self.require_window("near"), self.tokens("near", 0.5), lengths.indices
        room, past = max(window - near, 0), (index - near).clip(0)
        query, key = near + room * past / (past + window), room * index / (index + window)
        return (
            posenc.Segment.band("near", lengths.total, 0, near, index, index),
            posenc.Segment.band("far", lengths.total, near, None, query, key),
        )


@posenc.hookimpl
def posenc_register_strategies(register):
    register(Saturating)
