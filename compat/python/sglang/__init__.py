"""ditrelay's own modules under the usage guide's names: ``sglang.multimodal_gen.X`` is the module ``ditrelay.X``.

Raises:
    ImportError: the real sglang is installed here, too.
"""

from __future__ import annotations

from sglang._guard import refuse_beside_the_real_one
from sglang._loggers import share_loggers
from sglang._modules import share_modules

refuse_beside_the_real_one(__path__)
share_modules()
share_loggers()
