//! A RAFT connection from a peer.

use super::accept::Ended;
use super::counters::Counters;
use super::handler::Introduction;
use super::raft_frame;
use super::shared::Shared;
use super::stream::{Reader, Writer};
use super::wire::{decode_close, kind};

/// Hands the messages to the node until the connection ends.
pub(super) async fn serve(shared: &Shared, who: &Introduction, reader: &mut Reader, writer: &mut Writer) -> Ended {
    let counters = shared.counters(who.from);
    match receive_all(shared, who, &counters, reader, writer).await {
        Ok(()) => Ended::Done,
        Err(ended) => ended,
    }
}

async fn receive_all(
    shared: &Shared,
    who: &Introduction,
    counters: &Counters,
    reader: &mut Reader,
    writer: &mut Writer,
) -> Result<(), Ended> {
    loop {
        // All that is there already goes to the node at once.
        let mut messages = Vec::new();
        let mut ping = None;
        while let Some(frame) = reader.buffered()? {
            match frame.split() {
                (kind::MESSAGES, body) => raft_frame::decode(body, &mut messages).map_err(Ended::Protocol)?,
                (kind::PING, body) if body.len() == 8 => ping = Some(body),
                (kind::CLOSE, body) => return Err(Ended::Closed(decode_close(body))),
                _ => return Err(Ended::Protocol("an unexpected frame on a RAFT connection")),
            }
        }
        if let Some(time) = ping {
            counters.sent_bytes.add(writer.send(kind::PONG, &time).await?);
        }
        if messages.is_empty() {
            reader.fill(shared.settings.raft_read_timeout).await?;
            counters.received_bytes.add(reader.take_read_bytes());
        } else {
            counters.received_messages.add(messages.len() as u64);
            let received = shared.handler.receive(who.from, messages);
            writer.alive_while(shared.keepalive_interval(), received).await?;
        }
    }
}
