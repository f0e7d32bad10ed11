//! Inputs made from others, the same in every run: what a plain test uses in place of a fuzzer.

/// Makes inputs from seeds.
pub struct Mutator<'a> {
    random: u64,
    seeds: &'a [Vec<u8>],
}

impl<'a> Mutator<'a> {
    /// The inputs that follow from `seed` and `seeds`, of which there is at least one.
    pub fn new(seed: u64, seeds: &'a [Vec<u8>]) -> Mutator<'a> {
        Mutator { random: seed | 1, seeds }
    }

    /// The next input: a seed with one to eight changes.
    pub fn input(&mut self) -> Vec<u8> {
        let mut input = self.seeds[self.below(self.seeds.len())].clone();
        for _ in 0..1 << self.below(4) {
            self.change(&mut input);
        }
        input
    }

    fn change(&mut self, input: &mut Vec<u8>) {
        if input.is_empty() {
            input.push(0);
        }
        let at = self.below(input.len());
        match self.below(8) {
            0 => input[at] ^= 1 << self.below(8),
            1 => input[at] = [0, 1, 0x7f, 0x80, 0xff][self.below(5)],
            2 => input[at] = self.below(256) as u8,
            3 => {
                // Numbers on the wire are 16, 32 or 64 bits; ends and sums are what goes wrong with them.
                let value = [0u64, 1, 0x1000, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 62, u64::MAX][self.below(8)];
                let width = [2, 4, 8][self.below(3)];
                let bytes = &value.to_be_bytes()[8 - width..];
                for (to, from) in input[at..].iter_mut().zip(bytes) {
                    *to = *from;
                }
            }
            4 => input.truncate(at),
            5 => {
                let end = (at + 1 + self.below(16)).min(input.len());
                input.drain(at..end);
            }
            6 => {
                let end = (at + 1 + self.below(64)).min(input.len());
                let copy = input[at..end].to_vec();
                let to = self.below(input.len());
                input.splice(to..to, copy);
            }
            _ => {
                // The end of another seed.
                let other = &self.seeds[self.below(self.seeds.len())];
                let from = if other.is_empty() { 0 } else { self.below(other.len()) };
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
        }
    }

    fn below(&mut self, limit: usize) -> usize {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }
}
