// exp(d) = 2^n * e^r with n = d / ln 2 rounded to a multiple of 1/kSteps, r = d - n ln 2, and e^r a polynomial without its 1.
#pragma once

namespace {

constexpr float kLog2E = 0x1.715476p+0f;
// Cody-Waite: the high part has few bits, so that n * kLn2High is exact even without a fused multiply-add.
constexpr float kLn2High = 0x1.62e4p-1f;
constexpr float kLn2Low = 0x1.7f7d1cp-20f;
// ln(smallest normal float): below it exp is 0.
constexpr float kExpMin = -0x1.5d589ep+6f;

// Adding 1.5 * 2^23 / steps leaves a float rounded to a multiple of 1/steps, with the steps in its low bits.
constexpr float round_magic(int steps) { return 12582912.0f / static_cast<float>(steps); }

}  // namespace
