compiler: str
openmp: bool

def compiled_isas() -> list[str]: ...
def supported_isas() -> list[str]: ...
def row_forward(
    *,
    isa: str,
    dtype: int,
    logits: int,
    rows: int,
    vocab: int,
    row_stride: int,
    targets: int,
    row_starts: int,
    tokens: int,
    bias: int,
    mult: float,
    cap: float,
    slope: float,
    stats: int,
    logps: int,
    threads: int,
) -> None: ...
def row_backward(
    *,
    isa: str,
    dtype: int,
    logits: int,
    rows: int,
    vocab: int,
    row_stride: int,
    targets: int,
    row_starts: int,
    tokens: int,
    bias: int,
    mult: float,
    cap: float,
    slope: float,
    stats: int,
    coef: int,
    coef_sum: int,
    token_grad: int,
    out: int,
    out_stride: int,
    threads: int,
) -> None: ...
