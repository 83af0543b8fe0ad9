//! Who belongs to the cluster, as the log says.
//!
//! The directory changes only by applied entries, so every member that applied the same index knows the same members.
//! The Raft configuration follows from it: a change that is refused here never reaches raft-rs either.

use api::codec::{MemberAttributesRequest, MemberChange, MemberChangeKind, MemberUpdate};
use api::kv::Member;
use api::{Error, MemberId};

/// All members, and those that left for good.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Membership {
    /// The members, in order of their ids.
    #[prost(message, repeated, tag = "1")]
    pub members: Vec<Member>,
    /// Ids that were removed, in order; none of them comes back.
    #[prost(uint64, repeated, tag = "2")]
    pub removed: Vec<MemberId>,
}

impl Membership {
    /// The member of this id.
    pub fn get(&self, id: MemberId) -> Option<&Member> {
        self.position(id).ok().map(|at| &self.members[at])
    }

    /// Whether the member was removed for good.
    pub fn is_removed(&self, id: MemberId) -> bool {
        self.removed.binary_search(&id).is_ok()
    }

    /// The members that vote.
    pub fn voters(&self) -> impl Iterator<Item = MemberId> + '_ {
        self.members
            .iter()
            .filter(|member| !member.is_learner)
            .map(|member| member.id)
    }

    /// The members that only listen.
    pub fn learners(&self) -> impl Iterator<Item = MemberId> + '_ {
        self.members
            .iter()
            .filter(|member| member.is_learner)
            .map(|member| member.id)
    }

    fn position(&self, id: MemberId) -> Result<usize, usize> {
        self.members.binary_search_by_key(&id, |member| member.id)
    }

    /// Whether [`Membership::change`] would refuse the change, and why.
    ///
    /// # Errors
    /// As etcd's `ValidateConfigurationChange`; and the last voter stays, since nobody could ever undo its removal.
    pub fn check(&self, change: &MemberChange) -> Result<(), Error> {
        let Some(member) = &change.member else {
            return Err(Error::MemberNotFound);
        };
        if self.is_removed(member.id) {
            return Err(Error::MemberNotFound);
        }
        let known = self.get(member.id);
        match change.kind() {
            MemberChangeKind::Add => {
                if known.is_some() {
                    return Err(Error::MemberExists);
                }
                if member.id == 0 || member.peer_urls.is_empty() {
                    return Err(Error::BadMemberUrls);
                }
                if self.is_taken(&member.peer_urls, member.id) {
                    return Err(Error::PeerUrlExists);
                }
            }
            MemberChangeKind::Promote => {
                if !known.ok_or(Error::MemberNotFound)?.is_learner {
                    return Err(Error::MemberNotLearner);
                }
            }
            MemberChangeKind::Remove => {
                let known = known.ok_or(Error::MemberNotFound)?;
                if !known.is_learner && self.voters().count() == 1 {
                    return Err(Error::NotEnoughStarted);
                }
            }
        }
        Ok(())
    }

    fn is_taken(&self, urls: &[String], except: MemberId) -> bool {
        let others = self.members.iter().filter(|member| member.id != except);
        others
            .flat_map(|member| &member.peer_urls)
            .any(|taken| urls.contains(taken))
    }

    /// Carries a change out.
    ///
    /// # Errors
    /// As [`Membership::check`]; nothing is changed then.
    pub fn change(&mut self, change: &MemberChange) -> Result<(), Error> {
        self.check(change)?;
        let id = change.member_id();
        match (self.position(id), change.kind()) {
            (Err(at), MemberChangeKind::Add) => {
                let member = change.member.clone().expect("it was checked");
                self.members.insert(at, member);
            }
            (Ok(at), MemberChangeKind::Promote) => self.members[at].is_learner = false,
            (Ok(at), MemberChangeKind::Remove) => {
                self.members.remove(at);
                let at = self.removed.binary_search(&id).expect_err("it was checked");
                self.removed.insert(at, id);
            }
            _ => unreachable!("it was checked"),
        }
        Ok(())
    }

    /// Notes what a member says of itself. One that is gone meanwhile has nothing to say, which is no error.
    pub(crate) fn set_attributes(&mut self, request: &MemberAttributesRequest) {
        if let Ok(at) = self.position(request.member_id) {
            let attributes = request.attributes.clone().unwrap_or_default();
            self.members[at].name = attributes.name;
            self.members[at].client_urls = attributes.client_urls;
        }
    }

    /// Notes where peers reach a member from now on.
    pub(crate) fn update(&mut self, update: &MemberUpdate) -> Result<(), Error> {
        let at = self.position(update.id).map_err(|_| Error::MemberNotFound)?;
        if update.peer_urls.is_empty() {
            return Err(Error::BadMemberUrls);
        }
        if self.is_taken(&update.peer_urls, update.id) {
            return Err(Error::PeerUrlExists);
        }
        self.members[at].peer_urls.clone_from(&update.peer_urls);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: MemberId, url: &str, is_learner: bool) -> Member {
        Member {
            id,
            peer_urls: vec![url.to_owned()],
            is_learner,
            ..Default::default()
        }
    }

    fn change(kind: MemberChangeKind, member: Member) -> MemberChange {
        MemberChange {
            kind: kind.into(),
            member: Some(member),
        }
    }

    #[test]
    fn changes_are_checked_as_in_etcd() {
        use MemberChangeKind::{Add, Promote, Remove};
        let mut membership = Membership::default();
        let mut run = |kind, member| membership.change(&change(kind, member));
        assert_eq!(run(Add, member(2, "http://b", false)), Ok(()));
        assert_eq!(run(Add, member(1, "http://a", true)), Ok(()));
        assert_eq!(run(Add, member(1, "http://c", false)), Err(Error::MemberExists));
        assert_eq!(run(Add, member(3, "http://a", false)), Err(Error::PeerUrlExists));
        assert_eq!(run(Add, Member::default()), Err(Error::BadMemberUrls));
        assert_eq!(run(Promote, member(2, "", false)), Err(Error::MemberNotLearner));
        assert_eq!(run(Promote, member(9, "", false)), Err(Error::MemberNotFound));
        assert_eq!(
            run(Remove, member(2, "", false)),
            Err(Error::NotEnoughStarted),
            "the last voter"
        );
        assert_eq!(run(Promote, member(1, "", false)), Ok(()));
        assert_eq!(run(Remove, member(2, "", false)), Ok(()));
        assert_eq!(run(Remove, member(2, "", false)), Err(Error::MemberNotFound));
        assert_eq!(
            run(Add, member(2, "http://d", false)),
            Err(Error::MemberNotFound),
            "ids never come back"
        );
        assert_eq!(
            membership.members.iter().map(|member| member.id).collect::<Vec<_>>(),
            [1]
        );
        assert_eq!(membership.removed, [2]);
    }
}
