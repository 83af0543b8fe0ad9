//! The quota of a store (`--quota-backend-bytes`), as etcd has it: what would not fit is refused where it arrives and
//! raises an alarm, and from then on the whole cluster refuses what grows until the alarm is ended.

use api::kv::{PutRequest, RequestOp, RequestOpKind, TxnRequest};

/// What a key takes beside itself and its value, in bytes: etcd's estimate.
const KEY_BYTES: u64 = 256;
/// What a lease takes, likewise.
pub(crate) const LEASE_BYTES: u64 = 64;
/// From so much of the quota on there is a warning, in percent.
pub(crate) const WARNING_PERCENT: u64 = 80;

/// What a put adds, in bytes.
pub(crate) fn cost_of_put(put: &PutRequest) -> u64 {
    KEY_BYTES + (put.key.len() + put.value.len()) as u64
}

/// What a transaction adds, in bytes: the more of what its branches add.
pub(crate) fn cost_of_txn(txn: &TxnRequest) -> u64 {
    let cost = |operations: &[RequestOp]| -> u64 {
        let costs = operations.iter().map(|operation| match &operation.request {
            Some(RequestOpKind::Put(put)) => cost_of_put(put),
            Some(RequestOpKind::Txn(nested)) => cost_of_txn(nested),
            _ => 0,
        });
        costs.sum()
    };
    cost(&txn.success).max(cost(&txn.failure))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dearer_branch_counts() {
        let put = |length: usize| RequestOp {
            request: Some(RequestOpKind::Put(PutRequest {
                key: "k".into(),
                value: vec![0; length].into(),
                ..Default::default()
            })),
        };
        let nested = RequestOp {
            request: Some(RequestOpKind::Txn(TxnRequest {
                success: vec![put(5)],
                ..Default::default()
            })),
        };
        let txn = TxnRequest {
            success: vec![put(10), put(20)],
            failure: vec![put(100), nested, RequestOp { request: None }],
            ..Default::default()
        };
        assert_eq!(cost_of_txn(&txn), 2 * 257 + 105);
        assert_eq!(cost_of_txn(&TxnRequest::default()), 0);
    }
}
