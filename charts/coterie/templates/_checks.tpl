{{/* What cannot work is said before anything is made. */}}
{{- define "coterie.checks" -}}
{{- if and .Values.checks.kserve (not (.Capabilities.APIVersions.Has "serving.kserve.io/v1beta1/InferenceService")) -}}
{{- fail "This cluster does not know InferenceServices (serving.kserve.io/v1beta1). Install KServe first, in Standard mode: https://kserve.github.io. To render without a cluster say --set checks.kserve=false." -}}
{{- end -}}
{{- if and .Values.checks.kserve (semverCompare "<1.27-0" .Capabilities.KubeVersion.Version) -}}
{{- fail (printf "This cluster is Kubernetes %s, and the chart needs 1.27 or later." .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- if and .Values.pipelines.enabled .Values.checks.pipelines (not (.Capabilities.APIVersions.Has "argoproj.io/v1alpha1/Workflow")) -}}
{{- fail "This cluster does not know Workflows (argoproj.io/v1alpha1), which Kubeflow Pipelines runs on. Install Kubeflow Pipelines first, or say --set pipelines.enabled=false to serve alone. To render without a cluster say --set checks.pipelines=false." -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]" .Release.Name) -}}
{{- fail (printf "The release is called %s, and an InferenceService's name begins with a letter. Give the release another name." .Release.Name) -}}
{{- end -}}
{{- if gt (len .Release.Name) 40 -}}
{{- fail (printf "The release's name %s is too long: at most 40 characters, as names of pods are made of it." .Release.Name) -}}
{{- end -}}
{{- range $name, $needed := dict "predictor" true "router" true "train" (and .Values.pipelines.enabled (or .Values.pipelines.upload .Values.refresh.enabled)) -}}
{{- if and $needed (not (get $.Values.images $name)) -}}
{{- fail (printf "images.%s is not given. Build and push the images with `make images REGISTRY=...`, which prints what to say here: --set images.%s=REGISTRY/coterie-%s@sha256:..." $name $name $name) -}}
{{- end -}}
{{- end -}}
{{- range $name, $image := merge (dict "redis.image" .Values.redis.image "postgresql.image" .Values.postgresql.image) (include "coterie.images" . | fromYaml) -}}
{{- if and $image (not (regexMatch "^[a-z0-9][a-zA-Z0-9.:-]*(/[a-zA-Z0-9._-]+)*(:[A-Za-z0-9_][A-Za-z0-9._-]*)?(@sha256:[0-9a-f]{64})?$" $image)) -}}
{{- fail (printf "%s: %s is no reference of an image. It is REGISTRY/NAME@sha256: and 64 hexadecimal digits." $name $image) -}}
{{- else if and $image (not (regexMatch "(:[A-Za-z0-9_][A-Za-z0-9._-]*|@sha256:[0-9a-f]{64})$" $image)) -}}
{{- fail (printf "%s: %s has neither digest nor tag. Say which one: %s@sha256:..." $name $image $image) -}}
{{- else if hasSuffix ":latest" $image -}}
{{- fail (printf "%s: %s is a name that means another image tomorrow. Give it by digest: ...@sha256:..." $name $image) -}}
{{- end -}}
{{- end -}}
{{- $routers := .Values.router.replicas -}}
{{- if .Values.router.autoscaling.enabled -}}{{- $routers = max $routers .Values.router.autoscaling.maxReplicas -}}{{- end -}}
{{- if gt (int $routers) 1 -}}
{{- if hasPrefix "sqlite:" (include "coterie.database" .) -}}
{{- fail (printf "feedback.database is SQLite, which one router can write to, and router allows %d. Say --set router.replicas=1 without autoscaling, or leave feedback.database out for PostgreSQL." (int $routers)) -}}
{{- end -}}
{{- if and .Values.feedback.enabled (not (include "coterie.redis" .)) (not .Values.stores.existingSecret) -}}
{{- fail (printf "Without Redis each router has the profiles in a SQLite file of its own, and feedback that one takes the others would not see; router allows %d. Say --set redis.enabled=true, or router.replicas=1, or feedback.enabled=false." (int $routers)) -}}
{{- end -}}
{{- end -}}
{{- range $name := list "router" "predictor" -}}
{{- $of := get $.Values $name -}}
{{- if and $of.autoscaling.enabled (lt (int $of.autoscaling.maxReplicas) (int $of.replicas)) -}}
{{- fail (printf "%s.autoscaling.maxReplicas (%d) is less than %s.replicas (%d), which are the fewest." $name (int $of.autoscaling.maxReplicas) $name (int $of.replicas)) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.feedback.enabled (not (include "coterie.database" .)) (not .Values.stores.existingSecret) -}}
{{- fail "feedback.enabled needs a database: say postgresql.enabled=true, or feedback.database, or feedback.enabled=false." -}}
{{- end -}}
{{- if and .Values.redis.enabled .Values.redis.connection -}}
{{- fail "redis.enabled runs a Redis, and redis.connection names another. Say redis.enabled=false to use the latter." -}}
{{- end -}}
{{- if and .Values.feedback.database .Values.postgresql.enabled -}}
{{- fail "postgresql.enabled runs a PostgreSQL, and feedback.database names another database. Say postgresql.enabled=false to use the latter." -}}
{{- end -}}
{{- if ne (empty .Values.bundle.uri) (empty .Values.bundle.profiles) -}}
{{- fail "bundle.uri and bundle.profiles belong together: the bundle, and the published folder (publish) of the run that made it." -}}
{{- end -}}
{{- if ne (empty .Values.s3.accessKey) (empty .Values.s3.secretKey) -}}
{{- fail "s3.accessKey and s3.secretKey belong together: give both, or neither and s3.existingSecret." -}}
{{- end -}}
{{- if and .Values.refresh.enabled (not .Values.pipelines.enabled) -}}
{{- fail "refresh.enabled starts a pipeline, and pipelines.enabled is false." -}}
{{- end -}}
{{- if and .Values.refresh.enabled (not .Values.refresh.run) -}}
{{- fail "refresh.enabled needs refresh.run: the address of the folder of the run that serves, as in s3://bucket/runs/first." -}}
{{- end -}}
{{- if and .Values.refresh.enabled (not (hasPrefix "postgresql" (include "coterie.database" .))) -}}
{{- fail "refresh.enabled reads feedback from PostgreSQL, which pods of the pipeline can reach: say postgresql.enabled=true, or feedback.database." -}}
{{- end -}}
{{- if and .Values.pipelines.enabled .Values.pipelines.createSecret -}}
{{- $found := lookup "v1" "Secret" .Values.pipelines.namespace "coterie-pipeline" -}}
{{- if $found -}}
{{- $by := $found.metadata.annotations | default dict -}}
{{- $owner := printf "%s/%s" (get $by "meta.helm.sh/release-namespace") (get $by "meta.helm.sh/release-name") -}}
{{- if eq $owner "/" -}}
{{- fail (printf "The Secret %s/coterie-pipeline is there already, made by hand. Say --set pipelines.createSecret=false to keep it, or delete it." .Values.pipelines.namespace) -}}
{{- else if ne $owner (printf "%s/%s" .Release.Namespace .Release.Name) -}}
{{- fail (printf "The Secret %s/coterie-pipeline belongs to the release %s: pipelines there use that release's key and stores. Give this release a pipelines.namespace of its own, or say --set pipelines.createSecret=false to share that one's." .Values.pipelines.namespace $owner) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* The project's own images by the name of their value, as YAML of a map. */}}
{{- define "coterie.images" -}}
{{- range $name, $image := .Values.images }}
images.{{ $name }}: {{ $image | quote }}
{{- end }}
{{- end }}
