//! The first members of a cluster by DNS (`--discovery-srv`): SRV records name them, one service for members with TLS and
//! one for those without, as etcd has it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use domain::base::iana::{Rcode, Rtype};
use domain::base::name::Name;
use domain::rdata::Srv;
use domain::resolv::StubResolver;

use crate::bootstrap::InitialMembers;
use crate::peer::PeerUrl;

/// Where to ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SrvOptions {
    /// The domain.
    pub domain: String,
    /// What comes after the names of the services, so that a domain has room for several clusters; or nothing.
    pub service_name: String,
}

/// The record of one member.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Record {
    priority: u16,
    host: String,
    port: u16,
}

/// What a record came to.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Found {
    name: String,
    url: String,
    /// Which of the advertised URLs it is, if it is this member's.
    own: Option<usize>,
}

/// Finds the members, this one by the name `name` and those of others by numbers: records name hosts, not members.
///
/// # Errors
/// There are none, or this one is not among them; in etcd's words where it has some.
pub(crate) async fn find(options: &SrvOptions, name: &str, advertised: &[String]) -> Result<InitialMembers, String> {
    find_by(&StubResolver::new(), options, name, advertised).await
}

async fn find_by(
    resolver: &StubResolver,
    options: &SrvOptions,
    name: &str,
    advertised: &[String],
) -> Result<InitialMembers, String> {
    let suffix = match &options.service_name[..] {
        "" => String::new(),
        name => format!("-{name}"),
    };
    let own = own_addresses(advertised).await?;
    let mut members: InitialMembers = BTreeMap::new();
    let (mut errors, mut matched) = (Vec::new(), BTreeSet::new());
    // Others have numbers for names, which this one's own is none of: two members would be taken for one.
    let mut numbers = (0_u64..)
        .map(|number| number.to_string())
        .filter(|number| number != name);
    for (scheme, service) in [("https", "etcd-server-ssl"), ("http", "etcd-server")] {
        let service = format!("{service}{suffix}");
        let found = match look_up(resolver, &service, &options.domain).await {
            // Etcd leaves out who is not found. But then this member founds a smaller cluster than the others do, if
            // its resolver is late. Nothing is on disk yet: to start again does no harm.
            Ok(records) => {
                let records = resolve(records).await?;
                name_members(&records, scheme, &service, name, &own, &mut numbers)
            }
            Err(error) => Err(error),
        };
        let (found, error) = match found {
            Ok(found) => (found, None),
            Err(error) => {
                let error = format!("error querying DNS SRV records for _{service} {error}");
                errors.push(error.clone());
                (Vec::new(), Some(error))
            }
        };
        let texts: Vec<String> = found
            .iter()
            .map(|found| format!("{}={}", found.name, found.url))
            .collect();
        tracing::info!(
            "service-scheme" = scheme,
            "service-name" = service,
            "server-name" = name,
            "discovery-srv" = options.domain,
            "advertise-peer-urls" = ?advertised,
            "found-cluster" = ?texts,
            error,
            "get cluster for {service} SRV"
        );
        for Found { name, url, own } in found {
            members.entry(name).or_default().push(url);
            matched.extend(own);
        }
    }
    if members.is_empty() {
        return Err(errors.join("; "));
    }
    for (node, urls) in &mut members {
        urls.sort();
        for url in urls {
            tracing::info!(node = format!("{node}={url}"), "got bootstrap from DNS for etcd-server");
        }
    }
    if !members.contains_key(name) {
        return Err(format!("cannot find local etcd member {name:?} in SRV records"));
    }
    if let Some(at) = (0..own.len()).find(|at| !matched.contains(at)) {
        return Err(format!(
            "--initial-advertise-peer-urls has {} but it is missing from the SRV records ({})",
            own[at].0,
            members[name].join(",")
        ));
    }
    let mut seen = BTreeSet::new();
    if let Some(url) = members.values().flatten().find(|url| !seen.insert(*url)) {
        return Err(format!("the SRV records name {url} more than once"));
    }
    Ok(members)
}

/// What is advertised, with the addresses behind it.
async fn own_addresses(advertised: &[String]) -> Result<Vec<(String, BTreeSet<SocketAddr>)>, String> {
    let mut own = Vec::new();
    for url in advertised {
        let authority = url.split_once("://").map_or(&url[..], |(_, authority)| authority);
        let addresses = tokio::net::lookup_host(authority).await;
        let addresses = addresses.map_err(|error| format!("{url}: {error}"))?;
        own.push((url.clone(), addresses.collect()));
    }
    Ok(own)
}

/// The records of a service, in an order that is the same for whoever asks.
async fn look_up(resolver: &StubResolver, service: &str, domain: &str) -> Result<Vec<Record>, String> {
    let text = format!("_{service}._tcp.{domain}");
    let name = Name::vec_from_str(&text).map_err(|error| format!("{text}: {error}"))?;
    let answer = resolver
        .query((name, Rtype::SRV))
        .await
        .map_err(|error| format!("lookup {text}: {error}"))?;
    match answer.header().rcode() {
        Rcode::NOERROR => {}
        Rcode::NXDOMAIN => return Err(format!("lookup {text}: no such host")),
        other => return Err(format!("lookup {text}: {other}")),
    }
    let unreadable = |error: &dyn std::fmt::Display| format!("lookup {text}: the answer cannot be read: {error}");
    let mut records = Vec::new();
    for record in answer
        .answer()
        .map_err(|error| unreadable(&error))?
        .limit_to_in::<Srv<_>>()
    {
        let record = record.map_err(|error| unreadable(&error))?;
        let srv = record.data();
        records.push(Record {
            priority: srv.priority(),
            host: srv.target().to_string().trim_end_matches('.').to_owned(),
            port: srv.port(),
        });
    }
    if records.is_empty() {
        return Err(format!("lookup {text}: no such host"));
    }
    records.sort();
    Ok(records)
}

/// The records with the addresses of their hosts.
async fn resolve(records: Vec<Record>) -> Result<Vec<(Record, Vec<SocketAddr>)>, String> {
    let mut resolved = Vec::new();
    for record in records {
        let found = tokio::net::lookup_host((&record.host[..], record.port)).await;
        let found = found.map(Iterator::collect);
        let addresses = match found {
            Ok(addresses) => addresses,
            Err(error) => {
                let Record { host, port, .. } = record;
                return Err(format!(
                    "the SRV records name {host}:{port}, which cannot be resolved: {error}; start again when it can be"
                ));
            }
        };
        resolved.push((record, addresses));
    }
    Ok(resolved)
}

/// Names the members of some records, each with its URL.
fn name_members(
    records: &[(Record, Vec<SocketAddr>)],
    scheme: &str,
    service: &str,
    name: &str,
    own: &[(String, BTreeSet<SocketAddr>)],
    numbers: &mut impl Iterator<Item = String>,
) -> Result<Vec<Found>, String> {
    let (mut members, mut error) = (Vec::new(), String::new());
    for (Record { host, port, .. }, addresses) in records {
        let url = match host.contains(':') {
            true => format!("{scheme}://[{host}]:{port}"),
            false => format!("{scheme}://{host}:{port}"),
        };
        if url.parse::<PeerUrl>().is_err() {
            error = format!("{url} is no peer URL");
            continue;
        }
        let known = own
            .iter()
            .position(|(_, own)| addresses.iter().any(|address| own.contains(address)));
        let name = match known {
            Some(at) if !own[at].0.starts_with(&format!("{scheme}://")) => {
                let advertised = &own[at].0;
                error = format!(
                    "bootstrap at {url} from DNS for {service} has scheme mismatch with expected peer {advertised}"
                );
                continue;
            }
            Some(_) => name.to_owned(),
            None => numbers.next().expect("numbers do not end"),
        };
        members.push(Found { name, url, own: known });
    }
    if members.is_empty() { Err(error) } else { Ok(members) }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use domain::base::message_builder::MessageBuilder;
    use domain::base::{Message, Ttl};
    use domain::resolv::stub::conf::{ResolvConf, ServerConf, Transport};
    use tokio::net::UdpSocket;

    use super::*;

    /// What a server answers: priority, port and target of the records of a service.
    type Zone = Vec<(&'static str, Vec<(u16, u16, &'static str)>)>;

    /// Asks a server with these records, as the member "me".
    async fn ask(zone: Zone, options: &SrvOptions, advertised: &[&str]) -> Result<InitialMembers, String> {
        ask_as("me", zone, options, advertised).await
    }

    async fn ask_as(
        name: &str,
        zone: Zone,
        options: &SrvOptions,
        advertised: &[&str],
    ) -> Result<InitialMembers, String> {
        let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let address = socket.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            let mut buffer = [0; 1500];
            loop {
                let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
                let request = Message::from_octets(buffer[..length].to_vec()).unwrap();
                let question = request.sole_question().unwrap();
                let asked = question.qname().to_string();
                let found = zone.iter().find(|(name, _)| *name == asked);
                let rcode = if found.is_some() {
                    Rcode::NOERROR
                } else {
                    Rcode::NXDOMAIN
                };
                let mut answer = MessageBuilder::new_vec().start_answer(&request, rcode).unwrap();
                for (priority, port, target) in found.into_iter().flat_map(|(_, records)| records) {
                    let target = Name::vec_from_str(target).unwrap();
                    let srv = Srv::new(*priority, 0, *port, target);
                    answer.push((question.qname(), Ttl::from_secs(1), srv)).unwrap();
                }
                socket.send_to(&answer.finish(), from).await.unwrap();
            }
        });
        let mut conf = ResolvConf::new();
        conf.servers.push(ServerConf::new(address, Transport::UdpTcp));
        conf.finalize();
        let advertised: Vec<String> = advertised.iter().map(|url| (*url).to_owned()).collect();
        let found = find_by(&StubResolver::from_conf(conf), options, name, &advertised).await;
        serving.abort();
        found
    }

    fn options(service_name: &str) -> SrvOptions {
        SrvOptions {
            domain: "example.test".to_owned(),
            service_name: service_name.to_owned(),
        }
    }

    fn members(pairs: &[(&str, &[&str])]) -> InitialMembers {
        let owned = |urls: &[&str]| urls.iter().map(|url| (*url).to_owned()).collect();
        pairs
            .iter()
            .map(|(name, urls)| ((*name).to_owned(), owned(urls)))
            .collect()
    }

    #[tokio::test]
    async fn members_are_numbered_and_this_one_is_found_by_its_address() {
        let zone = || {
            vec![(
                "_etcd-server._tcp.example.test",
                vec![(2, 1, "127.0.0.3"), (1, 2, "127.0.0.2"), (1, 3, "localhost")],
            )]
        };
        let found = ask(zone(), &options(""), &["http://127.0.0.1:3"]).await.unwrap();
        assert_eq!(
            found,
            members(&[
                ("0", &["http://127.0.0.2:2"]),
                ("1", &["http://127.0.0.3:1"]),
                ("me", &["http://localhost:3"]),
            ])
        );
        let partly = ask(zone(), &options(""), &["http://127.0.0.1:3", "http://127.0.0.1:4"]).await;
        let partly = partly.unwrap_err();
        let missing = "--initial-advertise-peer-urls has http://127.0.0.1:4 but it is missing from the SRV records (http://localhost:3)";
        assert_eq!(partly, missing);
        let absent = ask(zone(), &options(""), &["http://127.0.0.1:4"]).await.unwrap_err();
        assert_eq!(absent, "cannot find local etcd member \"me\" in SRV records");
    }

    #[tokio::test]
    async fn no_two_members_are_taken_for_one() {
        let zone = || {
            vec![
                ("_etcd-server-ssl._tcp.example.test", vec![(0, 1, "127.0.0.1")]),
                (
                    "_etcd-server._tcp.example.test",
                    vec![(0, 2, "127.0.0.1"), (0, 3, "127.0.0.1")],
                ),
            ]
        };
        // A name that is a number, and services of which each has others.
        let found = ask_as("0", zone(), &options(""), &["http://127.0.0.1:3"]).await;
        assert_eq!(
            found.unwrap(),
            members(&[
                ("0", &["http://127.0.0.1:3"]),
                ("1", &["https://127.0.0.1:1"]),
                ("2", &["http://127.0.0.1:2"]),
            ])
        );
        // One whose address is not known yet is not left out.
        let mut zone = zone();
        zone[1].1.push((0, 4, "nowhere.invalid"));
        let error = ask(zone, &options(""), &["http://127.0.0.1:3"]).await.unwrap_err();
        assert!(error.contains("nowhere.invalid:4, which cannot be resolved"), "{error}");
    }

    #[tokio::test]
    async fn both_services_count_and_have_a_suffix() {
        let zone = vec![
            ("_etcd-server-ssl-x._tcp.example.test", vec![(0, 1, "127.0.0.1")]),
            (
                "_etcd-server-x._tcp.example.test",
                vec![(0, 2, "127.0.0.1"), (0, 3, "127.0.0.1")],
            ),
            ("_etcd-server._tcp.example.test", vec![(0, 9, "127.0.0.1")]),
        ];
        let found = ask(zone, &options("x"), &["https://127.0.0.1:1", "http://127.0.0.1:3"]).await;
        assert_eq!(
            found.unwrap(),
            members(&[
                ("0", &["http://127.0.0.1:2"]),
                ("me", &["http://127.0.0.1:3", "https://127.0.0.1:1"]),
            ])
        );
    }

    #[tokio::test]
    async fn what_cannot_be_used_is_said() {
        let error = ask(Vec::new(), &options(""), &["http://127.0.0.1:1"])
            .await
            .unwrap_err();
        for part in [
            "error querying DNS SRV records for _etcd-server-ssl lookup _etcd-server-ssl._tcp.example.test: no such host",
            "error querying DNS SRV records for _etcd-server lookup _etcd-server._tcp.example.test: no such host",
        ] {
            assert!(error.contains(part), "{error}");
        }
        let zone = vec![("_etcd-server-ssl._tcp.example.test", vec![(0, 1, "127.0.0.1")])];
        let error = ask(zone, &options(""), &["http://127.0.0.1:1"]).await.unwrap_err();
        let mismatch = "bootstrap at https://127.0.0.1:1 from DNS for etcd-server-ssl has scheme mismatch with expected peer http://127.0.0.1:1";
        assert!(error.contains(mismatch), "{error}");
        let twice = vec![(
            "_etcd-server._tcp.example.test",
            vec![(0, 1, "127.0.0.1"), (1, 1, "127.0.0.1")],
        )];
        let error = ask(twice, &options(""), &["http://127.0.0.1:1"]).await.unwrap_err();
        assert!(error.contains("more than once"), "{error}");
        let bad = SrvOptions {
            domain: "a..b".to_owned(),
            service_name: String::new(),
        };
        assert!(ask(Vec::new(), &bad, &["http://127.0.0.1:1"]).await.is_err());
    }
}
