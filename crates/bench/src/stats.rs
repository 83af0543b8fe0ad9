//! Medians, and ratios with their spread.

/// The median; none of nothing. NaN is not allowed.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        length if length % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

/// How one system's figure relates to the other's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Ratio {
    /// Medians over the rounds.
    pub(crate) a: f64,
    pub(crate) b: f64,
    /// Median of A over median of B.
    pub(crate) ratio: f64,
    /// Lowest and highest of the ratios within one round.
    pub(crate) low: f64,
    pub(crate) high: f64,
}

/// Compares what was measured in the same rounds; none unless every round has both, and B is above zero.
pub(crate) fn ratio(a: &[f64], b: &[f64]) -> Option<Ratio> {
    if a.len() != b.len() || b.iter().any(|value| *value <= 0.0) {
        return None;
    }
    let (median_a, median_b) = (median(a)?, median(b)?);
    let ratios: Vec<f64> = a.iter().zip(b).map(|(a, b)| a / b).collect();
    Some(Ratio {
        a: median_a,
        b: median_b,
        ratio: median_a / median_b,
        low: ratios.iter().copied().fold(f64::INFINITY, f64::min),
        high: ratios.iter().copied().fold(0.0, f64::max),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
    }

    #[test]
    fn ratios_have_a_spread() {
        let found = ratio(&[10.0, 30.0, 20.0], &[10.0, 10.0, 40.0]).unwrap();
        assert_eq!((found.a, found.b, found.ratio), (20.0, 10.0, 2.0));
        assert_eq!((found.low, found.high), (0.5, 3.0));
        assert_eq!(ratio(&[1.0], &[]), None);
        assert_eq!(ratio(&[1.0], &[0.0]), None);
    }
}
