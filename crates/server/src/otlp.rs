//! Traces of gRPC calls, sent to a collector by OTLP (`--enable-distributed-tracing`).
//!
//! A span covers a call from its request's headers to its status, with the names and attributes that OpenTelemetry has
//! for RPCs. A caller's `traceparent` is followed: its decision to sample holds, and the span is its child's. What is
//! not sampled costs a random number. Spans wait in a bounded queue for a thread that sends them; a collector that is
//! slow or away costs spans, never calls, and the log says so now and then.

use std::fmt;
use std::time::{Duration, Instant};

use frontend::observer::CODE_NAMES;
use frontend::{CallSpan, CallTracer, Method};
use http::HeaderMap;
use opentelemetry::propagation::{Extractor, TextMapPropagator as _};
use opentelemetry::trace::{Span as _, SpanKind, Status, Tracer as _, TracerProvider as _};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider, Span, SpanData};
use parking_lot::Mutex;

/// Least time between two lines about a collector that takes no spans.
const LOST_WARNING_PAUSE: Duration = Duration::from_secs(60);

/// Where spans go, and which.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TracingOptions {
    /// The collector: a host and port, or a URL. Plaintext unless the URL says https.
    pub address: String,
    /// `service.name`.
    pub service_name: String,
    /// `service.instance.id`; left out when empty.
    pub instance_id: String,
    /// How many calls in a million are sampled, of those whose caller did not decide it.
    pub sampled_per_million: u32,
}

/// Makes spans. Dropping it sends what waits.
pub(crate) struct Tracing {
    tracer: SdkTracer,
    propagator: TraceContextPropagator,
    provider: SdkTracerProvider,
}

impl fmt::Debug for Tracing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracing").finish_non_exhaustive()
    }
}

impl Tracing {
    /// Connects when there is something to send. To be called on a runtime's thread: the connection lives there.
    ///
    /// # Errors
    /// An address that is none.
    pub(crate) fn start(options: &TracingOptions) -> Result<Self, String> {
        let endpoint = if options.address.contains("://") {
            options.address.clone()
        } else {
            format!("http://{}", options.address)
        };
        let exporter = SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .build()
            .map_err(|error| format!("the collector {:?} cannot be used: {error}", options.address))?;
        let exporter = Reporting {
            exporter,
            address: options.address.clone(),
            outage: Mutex::default(),
        };
        let mut resource = Resource::builder().with_service_name(options.service_name.clone());
        if !options.instance_id.is_empty() {
            resource = resource.with_attribute(KeyValue::new("service.instance.id", options.instance_id.clone()));
        }
        let sampler = match options.sampled_per_million {
            0 => Sampler::AlwaysOff,
            rate => Sampler::TraceIdRatioBased(f64::from(rate) / 1e6),
        };
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_sampler(Sampler::ParentBased(Box::new(sampler)))
            .with_resource(resource.build())
            .build();
        Ok(Tracing {
            tracer: provider.tracer("metastore"),
            propagator: TraceContextPropagator::new(),
            provider,
        })
    }

    /// Sends what waits, and no more after that.
    pub(crate) fn stop(&self) {
        if let Err(error) = self.provider.shutdown() {
            tracing::warn!(%error, "the last spans were not sent");
        }
    }
}

/// Says in the log what becomes of spans.
#[derive(Debug)]
struct Reporting<E> {
    exporter: E,
    address: String,
    outage: Mutex<Outage>,
}

/// A time in which the collector takes no spans.
#[derive(Debug, Default)]
struct Outage {
    /// Spans that were lost and that nothing was said of.
    untold: usize,
    /// When something was said last.
    told: Option<Instant>,
}

impl Outage {
    /// So many spans were lost; returns how many to speak of, if it is time to.
    fn lost(&mut self, spans: usize, now: Instant) -> Option<usize> {
        self.untold += spans;
        let due = self
            .told
            .is_none_or(|told| now.saturating_duration_since(told) >= LOST_WARNING_PAUSE);
        due.then(|| {
            self.told = Some(now);
            std::mem::take(&mut self.untold)
        })
    }

    /// Some were sent; returns how many were lost since the last line if there was one.
    fn over(&mut self) -> Option<usize> {
        self.told.take().map(|_| std::mem::take(&mut self.untold))
    }
}

impl<E: opentelemetry_sdk::trace::SpanExporter> opentelemetry_sdk::trace::SpanExporter for Reporting<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let result = self.exporter.export(batch).await;
        let address = &self.address;
        match &result {
            Ok(()) => {
                if let Some(lost) = self.outage.lock().over() {
                    tracing::info!(address, lost, "traces export: the collector takes spans again");
                }
            }
            Err(error) => {
                if let Some(lost) = self.outage.lock().lost(spans, Instant::now()) {
                    tracing::warn!(address, %error, lost, "traces export: the collector took no spans");
                }
            }
        }
        result
    }

    fn shutdown(&self) -> OTelSdkResult {
        self.exporter.shutdown()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(|name| name.as_str()).collect()
    }
}

impl CallTracer for Tracing {
    fn start(&self, method: &'static Method, headers: &HeaderMap) -> Option<Box<dyn CallSpan>> {
        let parent = match headers.contains_key("traceparent") {
            true => self.propagator.extract_with_context(&Context::new(), &Headers(headers)),
            false => Context::new(),
        };
        let span = self
            .tracer
            .span_builder(format!("{}/{}", method.service, method.name))
            .with_kind(SpanKind::Server)
            .start_with_context(&self.tracer, &parent);
        if !span.is_recording() {
            return None;
        }
        let mut span = span;
        span.set_attribute(KeyValue::new("rpc.system", "grpc"));
        span.set_attribute(KeyValue::new("rpc.service", method.service));
        span.set_attribute(KeyValue::new("rpc.method", method.name));
        Some(Box::new(Recorded(span)))
    }
}

struct Recorded(Span);

impl CallSpan for Recorded {
    fn end(mut self: Box<Self>, code: usize) {
        self.0.set_attribute(KeyValue::new(
            "rpc.grpc.status_code",
            i64::try_from(code).unwrap_or(i64::MAX),
        ));
        // As OpenTelemetry has it for servers: what is the client's fault is no error of ours.
        if matches!(code, 2 | 4 | 12 | 13 | 14 | 15) {
            self.0.set_status(Status::error(CODE_NAMES[code]));
        }
        self.0.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tracing(sampled_per_million: u32) -> Tracing {
        let options = TracingOptions {
            // Nobody listens there, and nothing is sent before the end of the test.
            address: "127.0.0.1:1".to_owned(),
            service_name: "test".to_owned(),
            instance_id: String::new(),
            sampled_per_million,
        };
        Tracing::start(&options).expect("the address is good")
    }

    #[tokio::test]
    async fn the_rate_decides_unless_the_caller_has() {
        let method = frontend::methods().next().expect("there are methods");
        let none = HeaderMap::new();
        assert!(tracing(1_000_000).start(method, &none).is_some());
        assert!(tracing(0).start(method, &none).is_none());
        let parent = |flags: &str| {
            let mut headers = HeaderMap::new();
            let value = format!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{flags}");
            headers.insert("traceparent", value.parse().expect("ASCII"));
            headers
        };
        assert!(tracing(0).start(method, &parent("01")).is_some());
        assert!(tracing(1_000_000).start(method, &parent("00")).is_none());
        let mut broken = HeaderMap::new();
        broken.insert("traceparent", "nonsense".parse().expect("ASCII"));
        assert!(tracing(1_000_000).start(method, &broken).is_some());
        assert!(tracing(0).start(method, &broken).is_none());
    }

    #[tokio::test]
    async fn about_as_many_are_sampled_as_was_asked_for() {
        let method = frontend::methods().next().expect("there are methods");
        let tracing = tracing(100_000);
        let sampled = (0..5000)
            .filter(|_| tracing.start(method, &HeaderMap::new()).is_some())
            .count();
        assert!(
            (300..800).contains(&sampled),
            "{sampled} of 5000 at a rate of one in ten"
        );
    }

    #[test]
    fn lost_spans_are_spoken_of_now_and_then() {
        let mut outage = Outage::default();
        let begun = Instant::now();
        let after = |seconds| begun + Duration::from_secs(seconds);
        assert_eq!(outage.over(), None);
        assert_eq!(outage.lost(3, begun), Some(3));
        assert_eq!(outage.lost(4, after(1)), None);
        assert_eq!(outage.lost(5, after(59)), None);
        assert_eq!(outage.lost(6, after(60)), Some(15));
        assert_eq!(outage.lost(7, after(61)), None);
        assert_eq!(outage.over(), Some(7));
        assert_eq!(outage.over(), None);
        assert_eq!(outage.lost(1, after(62)), Some(1));
    }

    #[tokio::test]
    async fn a_bad_address_is_refused() {
        let options = TracingOptions {
            address: "not an address".to_owned(),
            service_name: "test".to_owned(),
            instance_id: String::new(),
            sampled_per_million: 1,
        };
        assert!(Tracing::start(&options).is_err());
    }
}
