//! The loss of a language model's head on a CPU, with its gradient: softmax cross-entropy of logits that are capped by
//! c * tanh(x / c), in one pass over each row while it is in the cache. It has nothing to do with BPE; it is here
//! because torch takes nine passes for it, a quarter of training a d4 with 32,768 tokens, and this is the one native
//! extension.
//!
//! With s = 1 / (1 + exp(2x / c)) the capped logit is c - 2c s and its derivative is 4 s (1 - s). The constant c drops
//! out of the softmax, and exp(-2c s) <= 1 needs no maximum to be subtracted first.

/// Numbers as the matrix product leaves them: float32, or bfloat16, the upper half of one.
pub trait Logit: Copy + Send {
    fn to_f32(self) -> f32;
    fn from_f32(x: f32) -> Self;
}

impl Logit for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        x
    }
}

#[derive(Clone, Copy)]
pub struct Bf16(pub u16);

impl Logit for Bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits((self.0 as u32) << 16)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Bf16 {
        let bits = x.to_bits();
        Bf16(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) as u16) // to nearest, ties to even; a quiet NaN stays one
    }
}

/// exp(x) for -87 < x < 88, to a few units in the last place: 2^n times a polynomial in what is left, |r| <= ln(2) / 2.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: added, it leaves the nearest integer in the lowest bits
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-1.428_606_8e-6, n.mul_add(-0.693_145_75, x)); // ln(2) in two parts
    let mut p = 1.0 / 720.0; // Taylor's series to the sixth power
    for coefficient in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = r.mul_add(p, coefficient);
    }
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// Rows of one thread: their logits (overwritten by the gradient), targets, weights and losses.
pub struct Rows<'a, L> {
    pub logits: &'a mut [L],
    pub targets: &'a [i64],
    pub weights: &'a [f32],
    pub losses: &'a mut [f32],
}

/// losses[i] = weights[i] * cross-entropy(row i, targets[i]), and each row of logits becomes its gradient.
#[inline(always)]
fn rows_generic<L: Logit>(rows: Rows<L>, cap: f32) {
    const LANES: usize = 32; // partial sums: enough that no addition waits for the one before
    let width = rows.logits.len() / rows.losses.len();
    let (mut s, mut p) = (vec![0f32; width], vec![0f32; width]);
    for (i, row) in rows.logits.chunks_exact_mut(width).enumerate() {
        let (target, weight) = (rows.targets[i] as usize, rows.weights[i]);
        for ((x, s), p) in row.iter().zip(&mut s).zip(&mut p) {
            let z = (x.to_f32() * (2.0 / cap)).clamp(-80.0, 80.0);
            *s = 1.0 / (1.0 + exp(z));
            *p = exp(-2.0 * cap * *s);
        }
        let mut sums = [0f32; LANES];
        let (chunks, tail) = (p.chunks_exact(LANES), p.chunks_exact(LANES).remainder());
        for chunk in chunks {
            for (sum, p) in sums.iter_mut().zip(chunk) {
                *sum += p;
            }
        }
        let total = sums.iter().chain(tail).sum::<f32>();
        rows.losses[i] = weight * (total.ln() + 2.0 * cap * s[target]);
        let scale = 4.0 * weight / total;
        for ((x, s), p) in row.iter_mut().zip(&s).zip(&p) {
            *x = L::from_f32(p * scale * (s * (1.0 - s)));
        }
        let slope = s[target] * (1.0 - s[target]);
        row[target] = L::from_f32((p[target] * scale - 4.0 * weight) * slope);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn rows_avx2<L: Logit>(rows: Rows<L>, cap: f32) {
    rows_generic(rows, cap)
}

fn rows_dispatched<L: Logit>(rows: Rows<L>, cap: f32) {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
        return unsafe { rows_avx2(rows, cap) }; // safe: the processor has both
    }
    rows_generic(rows, cap)
}

/// The same for all rows, shared out to threads.
pub fn loss_and_gradient<L: Logit>(rows: Rows<L>, cap: f32, num_threads: usize) {
    let count = rows.losses.len();
    if count == 0 {
        return;
    }
    let (width, share) = (rows.logits.len() / count, count.div_ceil(num_threads));
    std::thread::scope(|scope| {
        let parts = rows.logits.chunks_mut(share * width).zip(rows.targets.chunks(share));
        let parts = parts.zip(rows.weights.chunks(share)).zip(rows.losses.chunks_mut(share));
        for (((logits, targets), weights), losses) in parts {
            scope.spawn(move || rows_dispatched(Rows { logits, targets, weights, losses }, cap));
        }
    });
}
