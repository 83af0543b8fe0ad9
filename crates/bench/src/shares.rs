//! `put=20,get=70,delete=10`: how a mixed load is made up.

/// Weights of named operations, in the order of the names; at least one is above zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shares {
    weights: Vec<u32>,
    total: u32,
}

impl Shares {
    /// Reads `name=weight` pairs, divided by commas. What is not named has weight 0; weights need not add up to 100.
    pub(crate) fn parse(text: &str, names: &[&str]) -> Result<Self, String> {
        let mut weights = vec![0; names.len()];
        let mut seen = vec![false; names.len()];
        for pair in text.split(',') {
            let (name, weight) = pair
                .split_once('=')
                .ok_or_else(|| format!("{pair:?} is not NAME=WEIGHT"))?;
            let index = names
                .iter()
                .position(|known| *known == name.trim())
                .ok_or_else(|| format!("unknown operation {:?}: one of {}", name.trim(), names.join(", ")))?;
            if std::mem::replace(&mut seen[index], true) {
                return Err(format!("{:?} is given twice", name.trim()));
            }
            weights[index] = weight
                .trim()
                .parse::<u16>()
                .map_err(|_| format!("weight {:?} is not a whole number from 0 to 65535", weight.trim()))?
                .into();
        }
        let total = weights.iter().sum();
        if total == 0 {
            return Err("all weights are 0".to_owned());
        }
        Ok(Shares { weights, total })
    }

    /// The index of the operation that a number drawn evenly from all of `u32` stands for.
    pub(crate) fn pick(&self, random: u32) -> usize {
        let mut point = ((u64::from(random) * u64::from(self.total)) >> 32) as u32;
        for (index, weight) in self.weights.iter().enumerate() {
            if point < *weight {
                return index;
            }
            point -= weight;
        }
        unreachable!("the point is below the sum of the weights")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: &[&str] = &["put", "get", "delete"];

    #[test]
    fn parses() {
        let shares = Shares::parse("put=20, get=70,delete=10", NAMES).unwrap();
        assert_eq!(shares.weights, [20, 70, 10]);
        for wrong in [
            "",
            "put",
            "put=x",
            "put=-1",
            "put=1,put=2",
            "scan=1",
            "put=0,get=0",
            "put=70000",
        ] {
            assert!(Shares::parse(wrong, NAMES).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn picks_by_weight() {
        let shares = Shares::parse("put=1,delete=3", NAMES).unwrap();
        assert_eq!(shares.pick(0), 0);
        assert_eq!(shares.pick(u32::MAX / 4), 0);
        assert_eq!(shares.pick(u32::MAX / 4 + 2), 2);
        assert_eq!(shares.pick(u32::MAX), 2);
        let mut rng = fastrand::Rng::with_seed(7);
        let deletes = (0..10_000).filter(|_| shares.pick(rng.u32(..)) == 2).count();
        assert!((7_300..7_700).contains(&deletes), "{deletes}");
    }
}
